# SPDX-License-Identifier: Apache-2.0
"""Build backend that refuses to build, since the modules do not run outside this folder."""


def refuse(*_, **__):
    """Implement every hook of a build backend (PEP 517, PEP 660)."""
    raise SystemExit(
        'LeanViT runs from its folder and cannot be installed: run `make train`, or `pip install -r requirements.txt`.'
    )


build_wheel = build_sdist = build_editable = refuse
get_requires_for_build_wheel = get_requires_for_build_sdist = get_requires_for_build_editable = refuse
