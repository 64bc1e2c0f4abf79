"""What mixora runs in: versions of PEFT, devices, other processes, sharded tensors, weights in 4 bits."""
