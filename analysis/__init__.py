# SPDX-License-Identifier: Apache-2.0
"""Analysis of trained models for the tools: attention statistics, CKA, layer selection."""
