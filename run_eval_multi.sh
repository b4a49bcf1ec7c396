#!/bin/sh
# Evaluate the run trained last, or CFG with -pretrained=FILE. Flags of main_multi_gpu.py may follow and override these variables:
#   CFG, DATASET, DATA_PATH, BATCH_SIZE   what to evaluate (default: the configuration and best weights in ./output/latest)
#   CUDA_VISIBLE_DEVICES, NPROC           GPUs, number of processes
#   PYTHON                                the interpreter (default: .venv of the repository, else python3)
# All paths, including ./output/latest, are relative to the current directory.
ROOT=$(  # folder of the repository, also if this file is a symbolic link
    file=$0
    while CDPATH='' cd -- "$(dirname -- "$file")" && file=$(basename -- "$file") && [ -L "$file" ]; do
        file=$(readlink -- "$file")
    done
    pwd -P
)
CONFIGS=$ROOT/configs
[ "$(pwd -P)" = "$ROOT" ] && CONFIGS=./configs
[ -x "$ROOT/.venv/bin/python" ] && PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
for flag in "$@"; do
    case $flag in -cfg* | -resume* | -pretrained*) chosen=yes ;; esac
done
if [ -n "$CFG" ]; then
    set -- -cfg="$CFG" "$@"
elif [ -e output/latest ]; then
    echo "CFG is not set: evaluating output/latest. ImageNet: CFG=$CONFIGS/gmlp_s16_224.yaml DATA_PATH=/dataset/imagenet sh $0 -pretrained=./gmlp_s16_224.pdparams"
    set -- -pretrained=output/latest "$@"
elif [ -z "$chosen" ]; then
    echo "error: nothing was trained yet in $PWD/output/latest; run 'sh $ROOT/run_train_multi.sh' from here first, or set CFG and give -pretrained=FILE." >&2
    exit 2
fi
exec "${PYTHON:-python3}" "$ROOT/main_multi_gpu.py" ${DATASET:+-dataset="$DATASET"} ${DATA_PATH:+-data_path="$DATA_PATH"} \
    ${BATCH_SIZE:+-batch_size="$BATCH_SIZE"} -eval "$@"
