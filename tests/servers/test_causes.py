"""What a log says about a failed start: lines that users reported, word for word, and what we make of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.servers.triton.causes import diagnose

_LOAD = "failed to load 'tensorrt_llm' version 1: Internal: unexpected error when creating modelInstanceState: "


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (  # tensorrtllm_backend issue 531
            "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match. Note: "
            "Current Version: 228, Serialized Engine Version: 237",
            "built by another version of TensorRT",
            "the image of its own release",
        ),
        (  # tensorrtllm_backend issue 424
            "[TensorRT-LLM][ERROR] Assertion failed: Failed to deserialize cuda engine (/tmp/tritonbuild/tensorrtllm/"
            "tensorrt_llm/cpp/tensorrt_llm/runtime/tllmRuntime.cpp:72)",
            "built by another version of TensorRT",
            "the image of its own release",
        ),
        (  # tensorrtllm_backend issue 271
            "[TensorRT-LLM][ERROR] Assertion failed: When KV cache block reuse is set, model has to be built with "
            "paged context FMHA support (/home/jenkins/agent/batch_manager/trtGptModelInflightBatching.cpp:140)",
            "KV reuse is on, and the engine was built without paged-context attention",
            "package this engine again",
        ),
        (  # tensorrtllm_backend issue 168
            "maxTokensInPagedKvCache must be large enough to process at least 1 sequence to completion (i.e. must be "
            "larger than beam_width * tokensPerBlock * maxBlocksPerSeq)",
            "does not hold one sequence of full length",
            "nvidia-smi",
        ),
        (  # tensorrtllm_backend issue 281
            "[TensorRT-LLM][ERROR] CUDA runtime error in ::cudaMallocAsync(ptr, n, mCudaStream->get()): out of memory "
            "(/app/tensorrt_llm/cpp/tensorrt_llm/runtime/tllmBuffers.h:112)",
            "the GPU ran out of memory",
            "nvidia-smi",
        ),
        (  # tensorrtllm_backend issue 438
            "[TensorRT-LLM][ERROR] 1: [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)\n"
            "[TensorRT-LLM][ERROR] Assertion failed: Failed to deserialize cuda engine",
            "the GPU ran out of memory",
            "nvidia-smi",
        ),
        (  # tensorrtllm_backend issue 328
            "[TensorRT-LLM][ERROR] CUDA runtime error in cudaDeviceGetDefaultMemPool(&memPool, device): operation not "
            "supported (/app/tensorrt_llm/cpp/tensorrt_llm/runtime/bufferManager.cpp:170)",
            "vGPU",
            "whole GPU",
        ),
        (  # src/model_instance_state.cc
            "[TensorRT-LLM][ERROR] Assertion failed: Both encoder and decoder model paths are empty",
            "started elsewhere",
            "scalellm serve --repository",
        ),
    ],
)
def test_what_nvidias_backend_says_becomes_one_sentence_and_what_to_do(
    tmp_path: Path, line: str, message: str, hint: str
) -> None:
    log = tmp_path / "triton.log"
    log.write_text(f"I0 loading: tensorrt_llm:1\nE0 model_lifecycle.cc:638] {_LOAD}{line}\nI0 more\n")
    cause = diagnose(log)
    assert cause is not None
    assert message in cause.message
    assert hint in cause.hint


def test_what_nobody_knows_is_said_as_the_backend_says_it(tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    log.write_text(f"E0 model_lifecycle.cc:638] {_LOAD}[TensorRT-LLM][ERROR] Assertion failed: who knows\n")
    cause = diagnose(log)
    assert cause is not None
    assert cause.message.startswith("model tensorrt_llm does not load: unexpected error")
    assert cause.message.endswith("who knows")
