"""Parts of adapters: tensors by what they are for, and lower ranks as parts of one."""
