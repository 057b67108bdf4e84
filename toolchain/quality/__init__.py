"""What quantization changes in a model's predictions, measured on text: perplexity, divergence, agreement.

The models go through one decoder layer at a time, as calibration does, so that a 13B model needs the memory of a layer.
Everything is computed in float32: what differs is what was rounded on purpose.
"""
