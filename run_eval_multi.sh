#!/bin/sh
# Evaluates: the run that was trained last, or CFG with -pretrained=FILE. Any flag of main_multi_gpu.py may follow and wins.
#   CFG, DATASET, DATA_PATH, BATCH_SIZE   what to evaluate (default: the configuration and best weights in output/latest)
#   CUDA_VISIBLE_DEVICES, NPROC           where: GPUs, number of processes
cd "$(dirname "$0")" || exit 1
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
if [ -z "$CFG" ]; then
    if [ ! -e output/latest ]; then
        echo "error: nothing was trained yet; run 'sh run_train_multi.sh' first, or set CFG and give -pretrained=FILE." >&2
        exit 2
    fi
    echo "CFG is not set: evaluating output/latest. ImageNet: CFG=./configs/gmlp_s16_224.yaml DATA_PATH=/dataset/imagenet sh $0 -pretrained=./gmlp_s16_224.pdparams"
    set -- -pretrained=output/latest "$@"
fi
exec "${PYTHON:-python3}" main_multi_gpu.py -cfg="${CFG:-output/latest/config.yaml}" ${DATASET:+-dataset="$DATASET"} \
    ${DATA_PATH:+-data_path="$DATA_PATH"} ${BATCH_SIZE:+-batch_size="$BATCH_SIZE"} -eval "$@"
