from ltdd_scale.cli import console

if __name__ == "__main__":
    console()
