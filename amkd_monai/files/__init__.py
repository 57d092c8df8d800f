"""Reading and writing of files, by every command alike: NumPy, Pillow, nibabel and SimpleITK, no torch, no MONAI."""
