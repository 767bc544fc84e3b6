"""Benchmarks: FusedSAM against the ways of writing SAM that people use. See bench/README.md."""
