"""Speed and memory of the upsamplers, side by side with peers: `python -m benchmarks --help`."""
