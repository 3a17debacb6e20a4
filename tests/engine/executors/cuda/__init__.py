"""Tests of the CUDA executor without a GPU: fake devices, Triton's interpreter, machine code."""
