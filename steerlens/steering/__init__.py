"""What is done to a residual stream, where and when; and sampling text while it is done."""
