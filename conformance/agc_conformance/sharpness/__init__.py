"""SAM: problems for a backend, the questions it is asked, and the comparison of its answers."""
