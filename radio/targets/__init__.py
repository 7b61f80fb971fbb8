"""What the teachers say: standardizers, codec, stream."""
