"""Where outputs go: local files behind signed URLs, or any S3-compatible store. `base` is the seam."""
