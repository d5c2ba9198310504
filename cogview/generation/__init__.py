"""Decoding: sampling, requests, the decoding loop, speculation, beam search."""
