"""What clients send and receive: typed requests (msgspec) and replies (dataclasses for orjson)."""
