#!/usr/bin/env bash
# The longer checks, one after the other; `make check` calls this. All run, then a count; any failure fails.
# Each of the two long ones that need one core, protocol and the engines' seams, runs beside others.
# usage: scripts/check.sh BIN TORCH_INDEX   (BIN: the environment's bin folder)
# EP_CHECK names the parts to run, all by default.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
index=$2
read -ra parts <<<"${EP_CHECK:-sanitizers kernels wheel cuda install protocol abi seam stress}"
passed=0
failed=()

# begin NAME COMMAND...: runs it beside what follows, until `finish NAME`, which prints what it said and has its status.
declare -A begun=()
trap 'kill "${begun[@]}" 2>/dev/null || true' EXIT
begin() {
    mkdir -p build
    "${@:2}" >"build/$1.log" 2>&1 &
    begun[$1]=$!
}
finish() {
    local status=0
    wait "${begun[$1]}" || status=$?
    unset "begun[$1]"
    cat "build/$1.log"
    return "$status"
}

# The checker of docs/protocol.md's rules, begun before all other parts.
check_protocol() { finish protocol; }

check_sanitizers() { scripts/sanitizers.sh "$bin/python"; }

check_kernels() { scripts/kernels_on_cpu.sh; }

# Built as a user would build it, isolated, and with NVIDIA's compiler from its wheels: the next three parts check the result.
check_wheel() {
    local log=build/check/wheel.log wheels
    rm -rf build/check && mkdir -p build/check || return 1
    if ! EP_BACKEND_CUDA=1 "$bin/python" -m pip wheel -v --no-deps -w build/check . >$log 2>&1; then
        tail -50 $log
        return 1
    fi
    wheels=(build/check/ep_backend-*-py3-none-linux_x86_64.whl)
    echo "${wheels[*]} ($(stat -c %s "${wheels[0]}") bytes)"
    # The build environment held NVIDIA's compiler, and no torch.
    grep -q 'Successfully installed.* nvidia-cuda-nvcc' $log && ! grep -qE '(Collecting|Downloading|Processing) .*torch' $log
}

check_cuda() { "$bin/python" scripts/cuda_check.py build/check/*.whl; }

check_install() { "$bin/python" scripts/wheel_check.py build/check/*.whl "$index"; }

check_abi() { scripts/abi_matrix.sh build/check/*.whl "$bin/python"; }

check_seam() {
    local status=0
    begin seam env PYTHONSAFEPATH=1 "$bin/pytest" tests/vllm tests/sglang -m seam
    PYTHONSAFEPATH=1 "$bin/pytest" tests/vllm tests/sglang -m engine_long || status=$?
    finish seam && return "$status"
}

check_stress() { PYTHONSAFEPATH=1 "$bin/pytest" tests -m stress; }

if [[ " ${parts[*]} " == *" protocol "* ]]; then begin protocol "$bin/python" docs/protocol/check.py --full; fi
for part in "${parts[@]}"; do
    echo "== check: $part"
    start=$SECONDS
    if "check_$part"; then
        passed=$((passed + 1))
        echo "== check: $part ok ($((SECONDS - start)) s)"
    else
        failed+=("$part")
        echo "== check: $part FAILED ($((SECONDS - start)) s)"
    fi
done
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; fi
echo "$passed passed, ${#failed[@]} failed"
test ${#failed[@]} -eq 0
