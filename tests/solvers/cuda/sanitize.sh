# Run the tests that need a CUDA device under compute-sanitizer: memory errors, races in shared memory, misused barriers.
#
#   sh tests/solvers/cuda/sanitize.sh [TOOL...]     default: memcheck racecheck synccheck
#
# PYTHON: one with torch for CUDA, cuda-core and pytest. Exits with 1 where something is missing, or anything is found.
PYTHON="${PYTHON:-python3}"
SANITIZER="${SANITIZER:-compute-sanitizer}"

missing() {
    echo "make sanitize-cuda: $1" >&2
    exit 1
}

"$PYTHON" -c 'import torch' 2>/dev/null || missing "'$PYTHON' has no torch. Name one with torch for CUDA: PYTHON=..."
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    missing "no CUDA device: torch finds none, and there is nothing to check. Run it where there is one."
"$PYTHON" -c 'import cuda.core' 2>/dev/null || missing "'$PYTHON' has no cuda-core: pip install 'cuda-core[cu13]'"
"$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null || missing "'$PYTHON' has no pytest and hypothesis: pip install them"
command -v "$SANITIZER" >/dev/null || missing "no $SANITIZER. It comes with the CUDA toolkit; SANITIZER=... names its path."

# torch's own allocator would hide where one tensor ends and the next begins. Torch's kernels are not ours to check.
status=0
for tool in ${*:-memcheck racecheck synccheck}; do
    echo "compute-sanitizer, $tool ..."
    PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
        --kernel-name kernel_substring=diffopt_ --launch-timeout 0 \
        "$PYTHON" -m pytest -q -m cuda tests/solvers/test_cuda_executor.py || status=1
done
exit $status
