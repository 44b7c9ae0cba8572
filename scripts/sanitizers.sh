#!/usr/bin/env bash
# The C++ tests, whose ranks are threads of one process, under ThreadSanitizer and under AddressSanitizer with UBSan.
# usage: scripts/sanitizers.sh [PYTHON]   (an interpreter with torch, for the headers' place)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
torch=$("$python" build_support/find_torch.py)

# Address space randomisation with many bits is more than the ThreadSanitizer of older compilers can map.
fixed=()
if setarch "$(uname -m)" --addr-no-randomize true 2>/dev/null; then fixed=(setarch "$(uname -m)" --addr-no-randomize); fi

export TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1"
export ASAN_OPTIONS="detect_leaks=1 strict_string_checks=1"
export UBSAN_OPTIONS="halt_on_error=1 print_stacktrace=1"
for sanitizer in thread address,undefined; do
    folder=build/sanitize-${sanitizer%%,*}
    cmake -S . -B "$folder" -DEP_SANITIZE="$sanitizer" -DEP_BACKEND_CUDA=0 -DEP_TORCH_DIR="$torch" >/dev/null
    cmake --build "$folder" --target cpp_tests --parallel 2
    "${fixed[@]}" ctest --test-dir "$folder" --output-on-failure --no-tests=error --timeout 600
done
