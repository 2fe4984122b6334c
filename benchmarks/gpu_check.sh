#!/bin/bash
# The GPU check on a machine with a GPU and without a network: in the root of a checkout, with wheels in .whl and
# gpu_check.* in .gpu. Takes 4 to 6 minutes. Logs and rows go to $OUT (gpu_out).
export OUT=${OUT:-gpu_out}
mkdir -p "$OUT"
site=$(mktemp -d)
pip="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade"
$pip --target "$site" .whl/*.whl || exit 1
export PYTHONPATH=$site:$PWD/kernels:$PWD PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -c "import torch, triton, transformers as t; print(torch.__version__, triton.__version__, t.__version__)"

# part NAME SECONDS COMMAND…: the end of its log, or that it failed; the next part runs either way.
part() {
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" > "$OUT/$name.log" 2>&1 || echo "== $name failed or timed out"
  tail -c 1500 "$OUT/$name.log"
}

# On the CPU, while the GPU is busy with the kernels.
python3 -m oapl_engine.cli sft recipes/micro_sft.toml --model.out "$site/micro" > "$OUT/sft.log" 2>&1 &
part kernels 110 python3 .gpu/gpu_check.py kernels
part weights 90 python3 .gpu/gpu_check.py weights nccl
part trainer 90 python3 .gpu/gpu_check.py trainer
wait
part offline 60 python3 -m oapl_engine.cli train recipes/micro_offline.toml \
  --model.path "$site/micro" --run.dir "$site/offline"
tail -1 "$site/offline/metrics.jsonl" | cut -c1-500
part speed 120 python3 .gpu/gpu_check.py speed
part gpu_tests 40 python3 -m pytest -q -p no:cacheprovider -m gpu tests
echo "== all rows"
cut -c1-420 "$OUT/gpu_check.jsonl"
