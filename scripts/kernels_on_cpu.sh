#!/usr/bin/env bash
# What the CUDA kernels do, tested without a GPU (csrc/tests/cuda_on_cpu). Needs a C++ compiler and nothing of CUDA.
# usage: scripts/kernels_on_cpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# The sources as they are, but for what no header can change: PTX, shared memory whose size the launch says, and a word that
# means something else in the C++ library's headers.
to=build/cuda-on-cpu
rm -rf $to && mkdir -p $to
cp -r csrc/common csrc/kernels csrc/tests $to
cp csrc/tests/cuda_on_cpu/ptx.cuh $to/common/ptx.cuh
sed -i -E 's/extern __shared__ (.*) (\w+)\[\];/\1* const \2 = static_cast<\1*>(emulated::block().shared());/; s/__noinline__//' \
    $to/kernels/cuda/*.cu $to/kernels/cuda/*.cuh

flags=(-std=c++20 -O1 -g -pthread -ffp-contract=off -w "-I$to/tests/cuda_on_cpu" -include "$to/tests/cuda_on_cpu/emulator.h")
sources=(exchange dispatch combine sums layouts close)
compile() { g++ "${flags[@]}" -x c++ -c "$to/kernels/cuda/$1.cu" -o "$to/$1.o"; }
build() { g++ "${flags[@]}" $to/tests/cuda_on_cpu/kernels.cpp "${sources[@]/#/$to/}" -o $to/kernels_on_cpu; }
for source in "${sources[@]}"; do compile "$source"; done
sources=("${sources[@]/%/.o}")
build
timeout 300 $to/kernels_on_cpu

# A test that cannot fail proves nothing: places that are one too high must be noticed.
grep -q 'list \* s.count + at;' $to/kernels/cuda/layouts.cu
sed -i 's/list \* s.count + at;/list * s.count + at + 1;/' $to/kernels/cuda/layouts.cu
compile layouts
build
echo "== places that are wrong on purpose"
if timeout 300 $to/kernels_on_cpu >$to/wrong.txt 2>&1; then
    echo "nothing was noticed"
    exit 1
fi
grep -m1 FAILED $to/wrong.txt
echo "noticed, as it should be"
