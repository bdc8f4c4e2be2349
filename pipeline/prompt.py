def check_num_patches(columns, k):
    if columns < k: raise ValueError("x")
