"""The operations' CPU kernels in C++, beside the Python that calls them."""
