"""Jobs: files of many requests, generated in batches, resumed after interruptions and shared by several processes."""
