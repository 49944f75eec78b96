"""Files out of pictures, films and sound, and back: Pillow and PyAV, with ComfyUI's encoder settings."""
