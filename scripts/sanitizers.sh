#!/usr/bin/env bash
# The C++ tests, whose ranks are threads of one process, under ThreadSanitizer and under AddressSanitizer with UBSan.
# Needs a C++ compiler with its sanitizers and cmake; neither torch nor CUDA.
# usage: scripts/sanitizers.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# Address space randomisation with many bits is more than the ThreadSanitizer of older compilers can map.
fixed=()
if setarch "$(uname -m)" --addr-no-randomize true 2>/dev/null; then fixed=(setarch "$(uname -m)" --addr-no-randomize); fi

export TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1"
export ASAN_OPTIONS="detect_leaks=1 strict_string_checks=1"
export UBSAN_OPTIONS="halt_on_error=1 print_stacktrace=1"

build() {  # SANITIZER TARGET
    folder=build/sanitize-${1%%,*}
    cmake -S . -B "$folder" -DEP_CORE_TESTS_ONLY=ON -DEP_SANITIZE="$1" >/dev/null
    cmake --build "$folder" --target "$2" --parallel 2
}

for sanitizer in thread address,undefined; do
    build "$sanitizer" cpp_tests
    echo "== $sanitizer"
    "${fixed[@]}" timeout 300 "$folder/exchange_threads"
    "${fixed[@]}" timeout 120 "$folder/host_sum_threads"
done

# A check that cannot fail proves nothing: flags that are stored before their rows must be reported. Now and then the
# test itself finds a wrong row first, and ends; then once more.
build thread exchange_race
echo "== thread: a dispatch that is wrong on purpose"
for _ in 1 2 3 4 5; do
    if "${fixed[@]}" timeout 300 "$folder/exchange_race" >"$folder/race.txt" 2>&1; then
        echo "ThreadSanitizer did not report the race"
        exit 1
    fi
    if grep "WARNING: ThreadSanitizer: data race" "$folder/race.txt"; then
        echo "reported, as it should be"
        exit 0
    fi
    cat "$folder/race.txt"
done
exit 1
