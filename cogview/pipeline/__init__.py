"""The pipeline: requests become decoding programs, which a runner batches and turns into images and captions."""
