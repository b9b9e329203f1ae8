"""What models call: attention, linear, norm, rope, sampling."""
