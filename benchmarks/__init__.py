"""Speed, side by side with peers; ``benchmarks/README.md`` says how to run and read it."""
