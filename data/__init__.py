"""Rows, files, streams, the synthetic set and frames of videos."""
