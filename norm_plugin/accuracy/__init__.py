"""How an output is judged: fp64 oracles, the inputs they are asked about, and distances in ulps."""
