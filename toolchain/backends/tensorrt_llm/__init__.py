"""TensorRT-LLM checkpoints: written from the unified quantized layout with the same codes and scales, and read back.

What ``trtllm-build`` takes: ``config.json`` and one safetensors file a rank. Nothing is quantized here. The engine lane
(``tensorrt_engine``) builds on it; this room knows no recipe, no release and no GPU, and imports only numpy.
"""

from toolchain.backends.tensorrt_llm.export import CODES, INT8_FORMS, RESTORED
from toolchain.backends.tensorrt_llm.reader import TensorRtLlmCheckpoint
from toolchain.backends.tensorrt_llm.writer import write

__all__ = ["CODES", "INT8_FORMS", "RESTORED", "TensorRtLlmCheckpoint", "write"]
