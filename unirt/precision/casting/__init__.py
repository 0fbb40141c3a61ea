"""A float32 graph in fp16 or bf16: judged, planned, rewritten."""
