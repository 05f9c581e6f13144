"""What each container uses of the GPUs, by the processes that run on them."""
