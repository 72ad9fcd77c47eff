"""The model as flat buffers and messages: parameters, gradients, buffers, who serves which slice."""
