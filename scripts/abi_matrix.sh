#!/usr/bin/env bash
# One wheel, several releases of torch and of Python: installs WHEEL and runs unit tests with it.
# usage: scripts/abi_matrix.sh WHEEL [PYTHON]
# Each release of torch runs, under PYTHON, the tests of what meets torch's own code; the oldest and the newest Python run
# the unit tests, with the oldest and the newest torch, but for those that mostly wait for processes. Takes 6 GB in
# build/abi: one CUDA build of torch with its libraries, in which only torch itself is exchanged. There are no older or
# newer CPU builds on every package index, and a CUDA build runs the CPU kernels without a GPU.
# EP_ABI_TORCH and EP_ABI_PYTHON choose what runs.
set -euo pipefail
wheel=$(realpath "$1")
cd "$(dirname "$0")/.."
python=${2:-python3}
root=$PWD/build/abi
read -ra releases <<<"${EP_ABI_TORCH:-2.14.1 2.13.0 2.11.0}"
read -ra pythons <<<"${EP_ABI_PYTHON:-3.10:2.11.0 3.13:2.14.1}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH
passed=0
failed=0

# attempt NAME COMMAND...: runs it, counts it, says how long it took.
attempt() {
    local name=$1 start=$SECONDS
    shift
    if "$@"; then passed=$((passed + 1)) && echo "abi: $name ok ($((SECONDS - start)) s)"; else
        failed=$((failed + 1)) && echo "abi: $name FAILED ($((SECONDS - start)) s)"
    fi
}

# usage: run_tests ENV FILES...   Runs beside the checkout, not in it: what is imported must be the installed wheel.
run_tests() (
    cd "$root" || exit 1
    "$1/bin/python" -c "import sys, torch, ep_backend; from ep_backend._native import ops
print('Python', sys.version.split()[0], 'torch', torch.__version__, ep_backend.__file__)
assert ep_backend.__file__.startswith('$1/')" || exit 1
    "$1/bin/pytest" -q -n 2 --dist loadfile -p no:cacheprovider -c ../../pyproject.toml "${@:2}"
)

# What meets torch's own code: operators, tensors that come and go, custom operators with gradients.
with_torch=()
for name in handles layout numerics operators training; do with_torch+=("../../tests/unit/test_$name.py"); done

waiting=()
for name in bench doctor_warmup selftest start; do waiting+=("--ignore=../../tests/unit/test_$name.py"); done

# The sources compile against the headers of each release, too.
compile() {
    local torch
    torch=$("$root/env/bin/python" build_support/find_torch.py) || return 1
    rm -rf "$root/headers-$1" || return 1
    cmake -S . -B "$root/headers-$1" -DEP_BACKEND_CUDA=0 -DEP_TORCH_DIR="$torch" >/dev/null || return 1
    cmake --build "$root/headers-$1" --parallel 2 --target ep_backend >/dev/null
}

tools=(pytest pytest-timeout pytest-xdist hypothesis numpy)
"$python" -m venv --clear "$root/env"
echo "abi: one CUDA build of torch with its libraries, and the wheel (5.5 GB, some minutes)"
"$root/env/bin/pip" install -q "torch==${releases[0]}" "${tools[@]}" "$wheel"
echo "abi: installed ($SECONDS s)"
for release in "${releases[@]}"; do
    "$root/env/bin/pip" install -q --no-deps --no-warn-conflicts "torch==$release"
    attempt "headers of torch $release" compile "$release"
    attempt "torch $release, $("$root/env/bin/python" --version)" run_tests "$root/env" "${with_torch[@]}"
done

# Other Pythons borrow the CUDA libraries, which are the same for all of them.
nvidia=$(echo "$root"/env/lib/python*/site-packages/nvidia)
for pair in "${pythons[@]}"; do
    interpreter=python${pair%%:*} release=${pair##*:}
    command=$interpreter
    if ! "$command" --version >/dev/null 2>&1; then  # pyenv's stand-in for a version that is not switched on
        command=$(find ~/.pyenv/versions/*/bin -name "$interpreter" 2>/dev/null | tail -1)
    fi
    if [ -z "$command" ]; then
        failed=$((failed + 1))
        echo "abi: torch $release with $interpreter FAILED: no such interpreter here (EP_ABI_PYTHON chooses)"
        continue
    fi
    folder=$root/$interpreter
    "$command" -m venv --clear "$folder"
    ln -s "$nvidia" "$(echo "$folder"/lib/python*/site-packages)/nvidia"
    "$folder/bin/pip" install -q --no-deps --no-warn-conflicts "torch==$release"
    "$folder/bin/pip" install -q --no-warn-conflicts filelock fsspec jinja2 networkx setuptools sympy typing-extensions "${tools[@]}" "$wheel"
    attempt "torch $release, $interpreter" run_tests "$folder" ../../tests/unit "${waiting[@]}"
done
echo "$passed passed, $failed failed"
test "$failed" -eq 0
