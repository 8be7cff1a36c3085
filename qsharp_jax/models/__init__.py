"""Networks: the decoder, the value model on top of it, and pretrained weights."""
