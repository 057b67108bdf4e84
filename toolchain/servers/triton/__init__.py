"""NVIDIA Triton as the server: find it, start it, know that it answers, replace it when it does not."""
