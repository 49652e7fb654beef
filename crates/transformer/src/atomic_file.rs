//! Files and folders that appear whole or not at all.
//!
//! Everything is written under a temporary name beside its target, flushed to the disk, and renamed. A
//! full disk, a crash or an error in between leaves what was there before untouched.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// Writes a file through `write`, and puts it at `path` only when all of it is on the disk.
///
/// # Errors
/// The error of `write`, or the system's with the path; the old file is then still there.
pub fn write_file<T>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<T>,
) -> Result<T> {
    let parent = parent_of(path);
    let failed = |source| Error::io(path, source);
    let mut builder = tempfile::Builder::new();
    builder.prefix(".writing-");
    // Without it only the owner could read the file; the umask still applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let temporary = builder.tempfile_in(parent).map_err(failed)?;
    let (file, temporary) = temporary.into_parts();
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    let value = write(&mut writer)?;
    let file = writer
        .into_inner()
        .map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)?;
    temporary
        .persist(path)
        .map_err(|error| failed(error.error))?;
    sync(parent)?;
    Ok(value)
}

/// Writes `contents` to the file at `path`.
///
/// # Errors
/// As [`write_file`].
pub fn write_bytes(path: &Path, contents: impl AsRef<[u8]>) -> Result<()> {
    write_file(path, |writer| {
        writer
            .write_all(contents.as_ref())
            .map_err(|source| Error::io(path, source))
    })
}

/// Writes a folder through `write`, which gets the path of a temporary folder to fill, and puts it at
/// `path` only when all of it is on the disk.
///
/// Where `path` exists already, its entries that `replaces` accepts (by name) are replaced, all in one
/// step; the others, such as a user's own notes, are kept.
///
/// # Errors
/// The error of `write`, or the system's with the path; the old folder is then still there.
pub fn write_folder<T>(
    path: &Path,
    replaces: impl Fn(&str) -> bool,
    write: impl FnOnce(&Path) -> Result<T>,
) -> Result<T> {
    let failed = |source| Error::io(path, source);
    if path.exists() && !path.is_dir() {
        return Err(Error::file(
            path,
            "is a file, where a folder is to be written",
        ));
    }
    let parent = parent_of(path);
    fs::create_dir_all(parent).map_err(failed)?;
    let temporary = tempfile::Builder::new()
        .prefix(".writing-")
        .tempdir_in(parent)
        .map_err(failed)?;
    let value = write(temporary.path())?;
    sync_recursively(temporary.path())?;
    if path.exists() {
        exchange(temporary.path(), path).map_err(failed)?;
        // The temporary name now holds the old folder.
        for entry in fs::read_dir(temporary.path()).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let target = path.join(&name);
            if !name.to_str().is_some_and(&replaces) && !target.exists() {
                fs::rename(temporary.path().join(&name), target).map_err(failed)?;
            }
        }
        sync(path)?;
    } else {
        fs::rename(temporary.path(), path).map_err(failed)?;
        // Nothing is left under the temporary name to be removed.
        let _ = temporary.keep();
    }
    sync(parent)?;
    Ok(value)
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Swaps two folders of one file system: in one step where the system can, else in two renames.
fn exchange(a: &Path, b: &Path) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
    }
    let aside: PathBuf = a.with_extension("old");
    fs::rename(b, &aside)?;
    if let Err(error) = fs::rename(a, b) {
        fs::rename(&aside, b)?;
        return Err(error);
    }
    fs::rename(&aside, a)
}

fn sync_recursively(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|source| Error::io(folder, source))? {
        let path = entry.map_err(|source| Error::io(folder, source))?.path();
        if path.is_dir() {
            sync_recursively(&path)?
        } else {
            sync(&path)?
        }
    }
    sync(folder)
}

/// Waits until the file's contents, or the folder's names, are on the disk.
fn sync(path: &Path) -> Result<()> {
    // Only Unix opens folders as files; elsewhere a rename needs no flush of its own.
    if cfg!(unix) || path.is_file() {
        File::open(path)
            .and_then(|file| file.sync_all())
            .map_err(|source| Error::io(path, source))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_file_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write_bytes(&path, "old").unwrap();
        let failed = write_file(&path, |writer| {
            writer.write_all(b"new").unwrap();
            Err::<(), _>(Error::file("a", "stopped"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        write_bytes(&path, "new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn a_failed_folder_leaves_the_old_one() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("out");
        let fill = |text: &'static str| {
            move |folder: &Path| {
                fs::write(folder.join("model"), text).unwrap();
                Ok(())
            }
        };
        write_folder(&path, |_| true, fill("old")).unwrap();
        let failed = write_folder(
            &path,
            |_| true,
            |folder| {
                fill("new")(folder)?;
                Err::<(), _>(Error::file("out", "stopped"))
            },
        );
        assert!(failed.is_err());
        assert_eq!(fs::read(path.join("model")).unwrap(), b"old");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn a_folder_replaces_its_own_files_and_keeps_the_others() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("out");
        fs::create_dir_all(path.join("notes")).unwrap();
        fs::write(path.join("notes/mine"), "kept").unwrap();
        fs::write(path.join("model-2"), "stale").unwrap();
        fs::write(path.join("model-1"), "old").unwrap();
        write_folder(
            &path,
            |name| name.starts_with("model"),
            |folder| write_bytes(&folder.join("model-1"), "new"),
        )
        .unwrap();
        assert_eq!(names(&path), ["model-1", "notes"]);
        assert_eq!(fs::read(path.join("model-1")).unwrap(), b"new");
        assert_eq!(fs::read(path.join("notes/mine")).unwrap(), b"kept");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn the_error_names_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing/a");
        let error = write_bytes(&path, "x").unwrap_err().to_string();
        assert!(error.contains("missing/a"), "{error}");
        fs::write(folder.path().join("file"), "x").unwrap();
        let error = write_folder(&folder.path().join("file"), |_| true, |_| Ok(()))
            .unwrap_err()
            .to_string();
        assert!(error.contains("where a folder"), "{error}");
    }
}
