"""Metrics of images and of graded samples, and the harness of reports."""
