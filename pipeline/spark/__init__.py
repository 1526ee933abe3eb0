"""The SparkSession and all that it is built from: Java, jars, the class archive, file systems."""
