"""Start training: the flags that all stages share, the choice of a launcher, and signals to its processes."""
