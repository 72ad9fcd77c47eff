"""The model as flat buffers and messages: parameters, gradients, buffers, and which rank serves which slice."""
