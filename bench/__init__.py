"""The benchmark: problems x providers, raced process against process. `fastsepconv bench --help` is the way in."""
