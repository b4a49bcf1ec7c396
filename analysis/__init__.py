# SPDX-License-Identifier: Apache-2.0
"""What tools compute from trained models: attention statistics, CKA, layer selection, pictures. The loop does not need it."""
