#!/bin/sh
# Train on all visible GPUs, else in two processes on the CPU. Flags of main_multi_gpu.py may follow and override these variables:
#   CFG, DATASET, DATA_PATH, BATCH_SIZE   what to train (default: the embedded handwritten digits)
#   CUDA_VISIBLE_DEVICES, NPROC           GPUs, number of processes
#   NNODES, NODE_RANK, MASTER=HOST:PORT   several machines, one call on each
#   PYTHON                                the interpreter (default: .venv of the repository, else python3)
# All paths, including ./output, are relative to the current directory.
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
if [ -z "$CFG" ]; then
    echo "CFG is not set: training the embedded digits. ImageNet: CFG=$CONFIGS/gmlp_s16_224.yaml DATA_PATH=/dataset/imagenet sh $0"
fi
set -- -cfg="${CFG:-$CONFIGS/gmlp_digits.yaml}" ${DATASET:+-dataset="$DATASET"} ${DATA_PATH:+-data_path="$DATA_PATH"} \
    ${BATCH_SIZE:+-batch_size="$BATCH_SIZE"} "$@"
if [ -n "$NNODES" ]; then
    unset PADDLE_TRAINER_ID PADDLE_TRAINERS_NUM  # leftovers of another job would replace NODE_RANK
    exec "${PYTHON:-python3}" -m paddle.distributed.launch --nnodes "$NNODES" --rank "${NODE_RANK:?set NODE_RANK to 0 .. NNODES-1}" \
        --master "${MASTER:?set MASTER to HOST:PORT of node 0}" ${NPROC:+--nproc_per_node "$NPROC"} --log_dir "${LAUNCH_LOG_DIR:-output/launch}" \
        "$ROOT/main_multi_gpu.py" "$@"
fi
exec "${PYTHON:-python3}" "$ROOT/main_multi_gpu.py" "$@"
