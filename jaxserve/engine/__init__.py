"""Token ids in, token ids out: scheduling on the host, one compiled step on the device."""
