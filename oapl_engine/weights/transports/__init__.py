"""How buckets reach an engine. Each gives `views` (u8 tensors to fill), `describe()` for the receiver, `close()`."""
