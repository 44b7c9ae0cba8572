#!/usr/bin/env bash
# The longer checks, one after the other; `make check` calls this. All run, then a count; any failure fails.
# usage: scripts/check.sh BIN TORCH_INDEX   (BIN: the environment's bin folder)
# EP_CHECK names the parts to run, all by default.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
index=$2
read -ra parts <<<"${EP_CHECK:-protocol sanitizers wheel cuda install abi seam stress}"
passed=0
failed=()

# The checker of docs/protocol.md's rules.
check_protocol() { "$bin/python" docs/protocol/check.py --full; }

check_sanitizers() { scripts/sanitizers.sh "$bin/python"; }

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

check_seam() { PYTHONSAFEPATH=1 "$bin/pytest" tests/vllm tests/sglang -m "seam or engine_long"; }

check_stress() { PYTHONSAFEPATH=1 "$bin/pytest" tests -m stress; }

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
