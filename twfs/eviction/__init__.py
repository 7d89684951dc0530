"""Making room: classes and pins, quotas, which blocks go before which, and their removal."""
