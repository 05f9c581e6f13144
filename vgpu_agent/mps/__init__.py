"""How a GPU is shared by CUDA MPS: the control daemon, its limits, and what is known of them."""
